/* A CUDA driver that launches nothing and remembers what it was asked: see fake_driver.py. */
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int CUresult;
typedef struct {
  unsigned id;
  union {
    int number;
    unsigned char bytes[64];
  } value __attribute__((aligned(8)));
} CUlaunchAttribute;
typedef struct {
  unsigned grid[3], block[3], shared_mem_bytes;
  void* stream;
  CUlaunchAttribute* attrs;
  unsigned num_attrs;
} CUlaunchConfig;

typedef struct {
  uint64_t function, stream, context, extra;
  unsigned grid[3], block[3], shared_mem_bytes, num_attrs, attr_id;
  int attr_value;
  unsigned char params[1024];
} Launch;

/* Stands for the 128 bytes of a CUtensorMap, which are opaque. */
typedef struct {
  uint64_t address, dims[5], strides[4];
  uint32_t box[5];
  int data_type, swizzle, l2_promotion, number;
  unsigned char padding[12];
} Map;
_Static_assert(sizeof(Map) == 128, "as long as a CUtensorMap");

/* A module that was loaded: where, and how its image starts. Its handle is 0x9000 + its number. */
typedef struct {
  uint64_t context;
  unsigned char image[16];
  char function[64];
} Load;

enum { kMaxLaunches = 4096, kMaxLoads = 64, kMaxDevices = 4, kStackDepth = 8 };

/* Set by the tests. */
int fake_init_status, fake_version, fake_device_count, fake_launch_status, fake_set_attribute_status, fake_record;
int fake_encode_status, fake_load_status, fake_needs_context;
int fake_cc[kMaxDevices][2];
int fake_params_bytes;
/* Read by the tests. */
Launch fake_launches[kMaxLaunches];
Load fake_loads[kMaxLoads];
int fake_load_count, fake_init_count;
int fake_launch_count, fake_retain_count, fake_push_count, fake_last_attribute[2], fake_encode_count;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static __thread void* stack[kStackDepth];
static __thread int depth;

void fake_reset(void) {
  fake_needs_context = 0;
  fake_init_status = fake_encode_status = fake_load_status = fake_launch_status = fake_set_attribute_status = 0;
  fake_version = 12040;
  fake_device_count = 2;
  fake_record = 1;
  for (int i = 0; i < kMaxDevices; ++i) fake_cc[i][0] = 9, fake_cc[i][1] = 0;
  fake_params_bytes = 0;
  fake_load_count = fake_init_count = 0;
  fake_launch_count = fake_retain_count = fake_push_count = fake_encode_count = depth = 0;
  fake_last_attribute[0] = fake_last_attribute[1] = 0;
}

CUresult cuInit(unsigned flags) {
  ++fake_init_count;
  return flags ? 1 : fake_init_status;
}
CUresult cuDriverGetVersion(int* version) { *version = fake_version; return 0; }
CUresult cuDeviceGetCount(int* count) { *count = fake_device_count; return 0; }
CUresult cuDeviceGet(int* device, int ordinal) {
  if (ordinal < 0 || ordinal >= fake_device_count) return 101;
  *device = ordinal;
  return 0;
}
CUresult cuDeviceGetName(char* name, int size, int device) {
  strncpy(name, device ? "Second Fake GPU" : "Fake GPU", (size_t)size);
  return 0;
}
CUresult cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 16: *value = 132 + device; return 0;
    case 38: *value = 50 << 20; return 0;
    case 75: *value = fake_cc[device][0]; return 0;
    case 76: *value = fake_cc[device][1]; return 0;
    case 97: *value = 232448; return 0;
    default: return 1;
  }
}
CUresult cuDevicePrimaryCtxRetain(void** context, int device) {
  pthread_mutex_lock(&mutex);
  ++fake_retain_count;
  pthread_mutex_unlock(&mutex);
  *context = (void*)(uintptr_t)(0x1000 + device);
  return 0;
}
CUresult cuCtxGetCurrent(void** context) { *context = depth ? stack[depth - 1] : NULL; return 0; }
CUresult cuCtxPushCurrent_v2(void* context) {
  if (depth == kStackDepth || !context) return 201;
  stack[depth++] = context;
  pthread_mutex_lock(&mutex);
  ++fake_push_count;
  pthread_mutex_unlock(&mutex);
  return 0;
}
CUresult cuCtxPopCurrent_v2(void** context) {
  if (!depth) return 201;
  *context = stack[--depth];
  return 0;
}
CUresult cuGetErrorName(int status, const char** text) {
  *text = status == 1 ? "CUDA_ERROR_INVALID_VALUE" : status == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : NULL;
  return *text ? 0 : 1;
}
CUresult cuGetErrorString(int status, const char** text) {
  *text = status == 1 ? "invalid argument" : status == 700 ? "an illegal memory access was encountered" : NULL;
  return *text ? 0 : 1;
}
CUresult cuFuncSetAttribute(void* function, int attribute, int value) {
  (void)function;
  fake_last_attribute[0] = attribute;
  fake_last_attribute[1] = value;
  return depth ? fake_set_attribute_status : 201;
}
CUresult cuModuleLoadData(void** module, const unsigned char* image) {
  if (!depth) return 201;
  if (fake_load_status) return fake_load_status;
  pthread_mutex_lock(&mutex);
  const int number = fake_load_count++ % kMaxLoads;
  fake_loads[number].context = (uint64_t)(uintptr_t)stack[depth - 1];
  memcpy(fake_loads[number].image, image, sizeof fake_loads[number].image);
  pthread_mutex_unlock(&mutex);
  *module = (void*)(uintptr_t)(0x9000 + number);
  return 0;
}
CUresult cuModuleGetFunction(void** function, void* module, const char* name) {
  const uintptr_t number = (uintptr_t)module - 0x9000;
  if (number >= kMaxLoads) return 1;
  strncpy(fake_loads[number].function, name, sizeof fake_loads[number].function - 1);
  *function = (void*)(0xA000 + number);
  return 0;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, void* function, void** params, void** extra) {
  if (fake_needs_context && !depth) return 201;
  if (!fake_record) return fake_launch_status;
  pthread_mutex_lock(&mutex);
  if (fake_launch_count < kMaxLaunches) {
    Launch* launch = &fake_launches[fake_launch_count++];
    launch->function = (uint64_t)(uintptr_t)function;
    launch->stream = (uint64_t)(uintptr_t)config->stream;
    launch->context = (uint64_t)(uintptr_t)(depth ? stack[depth - 1] : NULL);
    launch->extra = (uint64_t)(uintptr_t)extra;
    memcpy(launch->grid, config->grid, sizeof launch->grid);
    memcpy(launch->block, config->block, sizeof launch->block);
    launch->shared_mem_bytes = config->shared_mem_bytes;
    launch->num_attrs = config->num_attrs;
    launch->attr_id = config->num_attrs ? config->attrs[0].id : 0;
    launch->attr_value = config->num_attrs ? config->attrs[0].value.number : 0;
    memcpy(launch->params, params[0], (size_t)fake_params_bytes);
  }
  pthread_mutex_unlock(&mutex);
  return fake_launch_status;
}
/* Refuses what the CUDA driver API's documentation forbids, as far as our maps go: rank 4 or 5, 16-bit elements with 128-byte swizzle or
   float32 without. */
CUresult cuTensorMapEncodeTiled(void* map, int data_type, uint32_t rank, void* address, const uint64_t* dims,
                                const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                                int interleave, int swizzle, int l2_promotion, int oob_fill) {
  if (fake_encode_status) return fake_encode_status;
  if (fake_needs_context && !depth) return 201;  // as the driver was seen to do
  if ((uintptr_t)map % 64 || (uintptr_t)address % 16 || rank < 4 || rank > 5) return 1;
  if (data_type != 6 && data_type != 7 && data_type != 9) return 1;
  const uint32_t item = data_type == 7 ? 4 : 2;
  if (interleave != 0 || swizzle != (item == 2 ? 3 : 0) || l2_promotion != 3 || oob_fill != 0) return 1;
  for (uint32_t i = 0; i < rank; ++i) {
    if (dims[i] < 1 || dims[i] > (1ull << 32) || box[i] < 1 || box[i] > 256 || element_strides[i] != 1) return 1;
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= (1ull << 40))) return 1;
  }
  if (box[0] * item % 16 || (swizzle && box[0] * item > 128)) return 1;
  Map encoded = {.address = (uint64_t)(uintptr_t)address, .data_type = data_type, .swizzle = swizzle, .l2_promotion = l2_promotion};
  memcpy(encoded.dims, dims, rank * sizeof *dims);
  memcpy(encoded.strides, strides, (rank - 1) * sizeof *strides);
  memcpy(encoded.box, box, rank * sizeof *box);
  pthread_mutex_lock(&mutex);
  encoded.number = fake_encode_count++;
  pthread_mutex_unlock(&mutex);
  memcpy(map, &encoded, sizeof encoded);
  return 0;
}
