"""What a worker sees of its machine's memory: GPUs through NVML and the RAM, and what models may take of them."""
