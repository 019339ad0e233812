/* A stand-in for the driver's green contexts: SMs are numbered, and a resource is a run of them. What the header
   declares, the compiler checks; the run is kept in the resource's padding, where the real driver keeps what is its. */
#include <cuda.h>
#include <stdlib.h>

typedef struct { unsigned first, count; } Run;

static const unsigned SMS = 132, UNIT = 8;
static unsigned GROUPS = 16; /* units whose SMs are neighbours; a real H100 of 132 SMs has been seen with 15 */

static unsigned CONTEXTS = 1000; /* that can still be made */

void set_groups(unsigned groups) { GROUPS = groups; }
void set_contexts(unsigned contexts) { CONTEXTS = contexts; }

static Run *run_of(const CUdevResource *resource) { return (Run *)resource->_internal_padding; }

static void fill(CUdevResource *resource, unsigned first, unsigned count) {
    resource->type = CU_DEV_RESOURCE_TYPE_SM;
    resource->sm.smCount = count;
    resource->sm.minSmPartitionSize = UNIT;
    resource->sm.smCoscheduledAlignment = UNIT;
    run_of(resource)->first = first;
    run_of(resource)->count = count;
}

CUresult cuDeviceGetDevResource(CUdevice device, CUdevResource *resource, CUdevResourceType type) {
    if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
    if (type != CU_DEV_RESOURCE_TYPE_SM) return CUDA_ERROR_INVALID_RESOURCE_TYPE;
    fill(resource, 0, SMS);
    return CUDA_SUCCESS;
}

CUresult cuDevSmResourceSplitByCount(CUdevResource *result, unsigned *groups, const CUdevResource *input,
                                     CUdevResource *rest, unsigned flags, unsigned least) {
    if (flags || input->type != CU_DEV_RESOURCE_TYPE_SM) return CUDA_ERROR_INVALID_VALUE;
    if (result == NULL) {
        *groups = least == UNIT ? GROUPS : 0;
        return CUDA_SUCCESS;
    }
    if (*groups != 1) return CUDA_ERROR_INVALID_VALUE;
    Run whole = *run_of(input);
    unsigned count = (least + UNIT - 1) / UNIT * UNIT;
    if (least == 0 || count > whole.count || count > GROUPS * UNIT) return CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION;
    fill(result, whole.first, count);
    fill(rest, whole.first + count, whole.count - count);
    return CUDA_SUCCESS;
}

CUresult cuDevResourceGenerateDesc(CUdevResourceDesc *description, CUdevResource *resources, unsigned count) {
    if (count != 1) return CUDA_ERROR_INVALID_VALUE;
    Run *run = malloc(sizeof *run);
    *run = *run_of(resources);
    *description = (CUdevResourceDesc)run;
    return CUDA_SUCCESS;
}

CUresult cuGreenCtxCreate(CUgreenCtx *context, CUdevResourceDesc description, CUdevice device, unsigned flags) {
    if (device != 0 || flags != CU_GREEN_CTX_DEFAULT_STREAM) return CUDA_ERROR_INVALID_VALUE;
    if (CONTEXTS == 0) return CUDA_ERROR_OUT_OF_MEMORY;
    CONTEXTS--;
    *context = (CUgreenCtx)description;
    return CUDA_SUCCESS;
}

CUresult cuGreenCtxStreamCreate(CUstream *stream, CUgreenCtx context, unsigned flags, int priority) {
    if (flags != CU_STREAM_NON_BLOCKING || priority != 0) return CUDA_ERROR_INVALID_VALUE;
    *stream = (CUstream)context;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult code, const char **name) {
    *name = code == CUDA_ERROR_INVALID_DEVICE  ? "CUDA_ERROR_INVALID_DEVICE"
            : code == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
                                               : "CUDA_ERROR";
    return CUDA_SUCCESS;
}

/* For the test: the SMs of a stream. */
void sms_of(CUstream stream, unsigned *first, unsigned *count) {
    *first = ((Run *)stream)->first;
    *count = ((Run *)stream)->count;
}
