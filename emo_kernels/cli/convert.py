"""Convert a checkpoint: .pth to .safetensors or back, any known key layout to the official one."""
