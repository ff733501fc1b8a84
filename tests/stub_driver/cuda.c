// As much of libcuda.so.1 as Triton's driver calls. Nothing runs; the last launch is kept for Python to read.
#include <cuda.h>
#include <string.h>

#define MOST 128

struct Launch {
  unsigned grid[3], block[3], shared, count;
  unsigned long long stream, parameters[MOST];
};

static struct Launch last;
static int sizes[MOST], launches, shared_memory = 232448;

// The bytes of each parameter of the kernel that is launched next; a driver reads them in the kernel's binary.
void stub_expect(unsigned count, const int *bytes) {
  last.count = count;
  memcpy(sizes, bytes, count * sizeof(int));
}

void stub_shared_memory(int bytes) { shared_memory = bytes; }

int stub_launches(struct Launch *launch) {
  *launch = last;
  return launches;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction kernel, void **parameters, void **extra) {
  unsigned grid[] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  unsigned block[] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  if (config->sharedMemBytes > (unsigned)shared_memory || grid[1] > 65535 || grid[2] > 65535 || grid[0] > 2147483647u)
    return CUDA_ERROR_INVALID_VALUE;
  memcpy(last.grid, grid, sizeof grid);
  memcpy(last.block, block, sizeof block);
  last.shared = config->sharedMemBytes;
  last.stream = (unsigned long long)config->hStream;
  for (unsigned i = 0; i < last.count; i++) {
    last.parameters[i] = 0;
    memcpy(&last.parameters[i], parameters[i], sizes[i]);
  }
  launches++;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_WARP_SIZE ? 32 : shared_memory;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction kernel) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "the stub driver refuses this launch";
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {  // Triton 3.9
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int number) { return *device = number, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)image, CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *kernel, CUmodule module, const char *name) {
  return *kernel = (CUfunction)module, CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }  // Triton 3.9
CUresult cuFuncSetAttribute(CUfunction kernel, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction kernel, CUfunc_cache config) { return CUDA_SUCCESS; }
