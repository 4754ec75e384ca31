"""Transports, which send bytes between ranks: solo, threads, shared memory, torch.distributed."""
