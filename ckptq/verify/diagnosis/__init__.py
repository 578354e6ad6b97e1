"""Why a weight does not come out: what is suspect is tried against all that can go wrong."""
