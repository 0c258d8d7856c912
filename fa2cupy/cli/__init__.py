"""The subcommands of ``python -m fa2cupy``: demo, env, compile, plan and run."""
