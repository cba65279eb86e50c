"""Lightning callbacks, one file each; conf/callbacks says which a run uses."""
