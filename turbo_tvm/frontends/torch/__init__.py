"""Import of PyTorch modules and model folders, through torch.export."""
