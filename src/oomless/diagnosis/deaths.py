"""Out-of-memory messages of one line: of the driver, of libraries and engines, of the host, and the ends of killed processes."""

from __future__ import annotations

import re

_TABLE = r"""
kernel | Triton | out of resource: (?P<what>[\w ]+?), Required: (?P<bytes>\d+),? Hardware limit: (?:(?P<limit>\d+)\.)?
driver | Triton | Triton Error \[(?:CUDA|HIP)\]: out of memory
library | cuBLAS | CUBLAS_STATUS_ALLOC_FAILED
library | cuBLAS | HIPBLAS_STATUS_ALLOC_FAILED
library | cuDNN | CUDNN_STATUS_ALLOC_FAILED
library | cuSOLVER | CUSOLVER_STATUS_ALLOC_FAILED
library | NCCL | Failed to CUDA (?:host )?(?:calloc|malloc)(?: async)? (?P<bytes>\d+) bytes
library | NCCL | Cuda failure (?:\d+ )?'out of memory'
library | bitsandbytes | \bError,? out of memory at line \d+ in file \S+
driver | CUDA | memory mapping failed with OOM on device
driver | CUDA | \bCUDA (?:driver |runtime )?error:? (?:\(?2\)?:? )?(?:cudaErrorMemoryAllocation: )?out of memory
driver | HIP | \bHIP error: out of memory
driver | CUDA | \bcudaErrorMemoryAllocation\b|\bCUDA_ERROR_OUT_OF_MEMORY\b
driver | CUDA | allocating (?P<number>\d+(?:\.\d+)?) (?P<unit>[KMGT]iB) on device \d+: cudaMalloc failed: out of memory
driver | Level Zero | \b(?:UR_RESULT|ZE_RESULT|PI)_ERROR_OUT_OF_(?:DEVICE_MEMORY|RESOURCES|HOST_MEMORY)\b
driver | XLA | RESOURCE_EXHAUSTED:[^\n]{0,80}? allocat\w+ (?P<bytes>\d+) bytes
allocator | MPS | Invalid buffer size: (?P<number>\d+(?:\.\d+)?) (?P<unit>bytes|[KMGT]i?B)
engine | vLLM | No available memory for the cache blocks
engine | vLLM | CUDA out of memory occurred when warming up sampler with (?P<requests>\d+) dummy requests
engine | vLLM | Free memory on device[^\n]{0,40}\([\d.]+/[\d.]+ GiB\) on startup is less than desired GPU memory utilization \([\d.]+, [\d.]+ GiB\)
engine | vLLM | max seq len \(\d+\)[^\n]{0,60}is larger than the (?:maximum number of tokens that can be stored in|available) KV cache[^\n]{0,20}
engine | vLLM | \(?[\d.]+ GiB KV cache is needed, which is larger than the available KV cache memory \([\d.]+ GiB\)
engine | vLLM | (?:CUDA Error: )?out of memory at \S*cumem_allocator\.cpp
engine | SGLang | Not enough memory\. Please try to increase --mem-fraction-static
placement | bitsandbytes | Some modules are dispatched on the CPU or the disk
host | PyTorch on the host | DefaultCPUAllocator: (?:not enough memory|can't allocate memory)(?::? you tried to allocate (?P<bytes>\d+) bytes)?
host | NumPy | Unable to allocate (?P<number>\d+(?:\.\d+)?) (?P<unit>bytes|[KMGT]i?B) for an array
host | pinned memory | cudaHostAlloc[^\n]{0,40}?(?:failed|out of memory)
host | Windows' page file | \[?WinError 1455\]?|The paging file is too small
host | shared memory (/dev/shm) | insufficient shared memory \(shm\)|is killed by signal: Bus error
host | shared memory (/dev/shm) | unable to (?:write to file|allocate shared memory\(shm\) for file|open shared memory object)[^\n]{0,80}
host | shared memory (/dev/shm) | /dev/shm[^\n]{0,80}No space left on device|No space left on device[^\n]{0,80}/dev/shm
host | mmap | unable to mmap (?P<bytes>\d+) bytes[^\n]{0,160}?Cannot allocate memory
host | the operating system | \[Errno 12\] Cannot allocate memory|\bcannot allocate memory\b|fork: Cannot allocate memory
host | C++ | std::bad_alloc
host | Ray | \bray\.exceptions\.OutOfMemoryError\b|node running low on memory
killed | SLURM | slurmstepd: error:[^\n]{0,60}oom[_-]kill\w*|Detected \d+ oom[_-]kill event|(?:task|step)s? ha(?:s|ve) been OOM Killed|Exceeded job memory limit|OUT_OF_MEMORY(?= 0:125)
killed | the container's limit | Memory cgroup out of memory: Kill(?:ed)? process \d+|oom-kill:constraint=CONSTRAINT_MEMCG\b
killed | the kernel | Out of memory: Kill(?:ed)? process \d+|\boom-kill:constraint=\w+|invoked oom-killer
killed | the container | \bOOMKilled\b|\bexit(?:ed with|ing with)?(?: code| status)?[ :=]+137\b
killed | a data-loader worker | DataLoader worker \(pid\(?s?\)? [\d, ]+\) (?:is killed by signal: Killed|exited unexpectedly)
killed | the launcher | exits with return code = -9\b|\bexitcode\s*:\s*-9\b|\bSignal 9 \(SIGKILL\)|died with <Signals\.SIGKILL: 9>|SIGKILL(?:: 9| \(9\))|terminated by signal (?:9|SIGKILL)
killed | Ray | Worker unexpectedly exits with a connection error code 2\. End of file|A worker died or was killed while executing a task
killed | Colab | session crashed after using all available RAM
killed | Kaggle | notebook tried to allocate more memory than is available
killed | the notebook's server | kernel appears to have died|Kernel died|Kernel (?:crashed while executing|Restarting)|Canceled future for execute_request
"""
PROVED = ("SLURM", "the kernel", "the container's limit", "Colab", "Kaggle", "the container")
"""Who says that it was the host's memory, where others say only that the process was killed."""

_LINES = (
    ("killed", "the shell", r"^(?:\S+: line \d+:\s+\d+ )?(?:Killed(?:\s{2,}.*)?|已杀死|已终止)[ \t]*$"),
    ("host", "Python", r"^(?:\w+\.)*MemoryError\b"),
)

OTHERS = [
    *(
        (kind, source, re.compile(pattern.replace(" ", r"\s+"), re.IGNORECASE))
        for kind, source, pattern in (row.split(" | ", 2) for row in _TABLE.strip().splitlines())
    ),
    *((kind, source, re.compile(pattern, re.MULTILINE)) for kind, source, pattern in _LINES),
]
"""Kind, who says it, and a pattern with groups "number" and "unit", or "bytes", where it names a size."""
