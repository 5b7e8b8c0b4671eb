"""The words of the compiler: Site, Mask, Loop, Prefix, Contract, Refusal, Plan, Report, errors, graph vocabulary."""
