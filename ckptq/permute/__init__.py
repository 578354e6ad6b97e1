"""RoPE row order of q/k projections: what a permutation does to each of their stored tensors.

`ckptq.rope_order` says where every row goes and `effect` what that means for a tensor, from names
and shapes alone; `targets` asks it for the tensors of a checkpoint, `reordered` is such a tensor as
the pipeline reads it, `apply` moves bytes, `marks` writes down which order a checkpoint is in.
"""
