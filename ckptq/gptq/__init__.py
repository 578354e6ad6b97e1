"""GPTQ while the layers run: Hessians of a layer's Linears, then their codes, layer by layer."""
