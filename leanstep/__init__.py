"""The one package that `pip install` brings: in it lie optimizers, engine, models, recipes and tools, which a clone has
beside it. `leanstep` alone lists the commands."""
