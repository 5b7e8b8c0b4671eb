"""From a KernelSpec to Triton source, to a built and cached callable, and to binaries made ahead of time."""
