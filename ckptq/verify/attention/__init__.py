"""What q, k and v become under the checkpoint's scales, in a short pass of the source."""
