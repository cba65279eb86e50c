"""Features of a frozen encoder: computed once (compute, ``nxtp features``), read by training (store)."""
