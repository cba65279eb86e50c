"""hydra/sweeper=optuna: plugin.py is Hydra's side, trials.py Optuna's, space.py translates ranges."""
