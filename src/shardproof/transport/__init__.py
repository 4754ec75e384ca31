"""What carries bytes between ranks: solo, threads, torch.distributed; and the ledger."""
