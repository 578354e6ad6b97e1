"""`python -m ckptq`, and so `torchrun -m ckptq`."""

from ckptq.cli import main

if __name__ == "__main__":
    main()
