"""OS-SCL anomalous sound detection, reproduced. Read the modules in the order in which a clip flows:

config, data/, features, model, losses, trainer, train, evaluate, metrics.
"""

__version__ = "0.1.0"
