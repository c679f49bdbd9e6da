"""The own engine: scheduler, KV blocks, prefix cache, sampler, runners; and the other engines behind the same seam."""
