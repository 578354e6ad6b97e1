"""RoPE row order of q/k projections: what a permutation does to each of their stored tensors.

`ckptq.rope_order` says where every row goes and `effect` what that means for a tensor, from names
and shapes alone; `apply` moves bytes, `marks` writes down in a checkpoint which order it is in.
`run` alone reads and writes files.
"""
