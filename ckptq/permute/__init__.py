"""RoPE row order of q/k projections: what a permutation does to each of their stored tensors.

`order` says where every row goes and `effect` what that means for a tensor, from names and shapes
alone; `apply` moves bytes. `proof` makes scales that no permutation can spoil, `marks` writes down
in a checkpoint which order it is in. Nothing here reads or writes a file.
"""
