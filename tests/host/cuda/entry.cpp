// A library for one kernel of one source: g++ -DFA2_HOST_SOURCE='"sm80/flash_fwd.cu"' -DFA2_HOST_KERNEL=flash_fwd ...
#include FA2_HOST_SOURCE

namespace {

template <class Params>
int start(void (*)(Params), const fa2_host::Launch& launch) {
  if (launch.params_bytes != sizeof(Params)) {
    snprintf(launch.message, launch.message_bytes, "the kernel's parameters have %zu bytes, the host's have %llu",
                 sizeof(Params), static_cast<unsigned long long>(launch.params_bytes));
    return 1;
  }
  return fa2_host::run(launch, [](const void* params) { FA2_HOST_KERNEL(*static_cast<const Params*>(params)); });
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int host_launch(const fa2_host::Launch* launch) {
  return start(FA2_HOST_KERNEL, *launch);
}

extern "C" __attribute__((visibility("default"))) const char* host_sites() { return fa2_host::sites(); }
