"""Images read by the kernel through its cache (fscache, cachefiles in its on-demand mode): protocol, device, guard."""
