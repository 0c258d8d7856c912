"""Tests with torch and JAX on the CPU; they run where both are installed."""
