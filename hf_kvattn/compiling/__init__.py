"""`torch.compile` and CUDA graphs: ops that stand in a graph for all that depends on how full a cache is."""
