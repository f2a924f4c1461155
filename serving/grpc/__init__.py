"""KServe v2 and Triton's extensions over gRPC: the second door, with the same references as the first."""
