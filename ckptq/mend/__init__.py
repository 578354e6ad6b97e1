"""`ckptq mend`: what `verify` names, repaired where the repair is certain."""
