"""Placements of networks on several processes: ddp, FSDP2, DeepSpeed."""
