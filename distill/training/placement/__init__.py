"""Where networks live and how they step: ddp, FSDP2, DeepSpeed."""
