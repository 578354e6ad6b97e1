"""The same rows decoded twice: by ckptq, and by the libraries that define the formats."""
