"""`nxtp sweep search`: Optuna in place of a grid."""
