"""OS-SCL anomalous sound detection, reproduced. Read the modules in the order in which a clip flows:

config -> dataset -> reader -> features -> model -> losses -> train -> evaluate -> metrics -> report.
"""

__version__ = "0.1.0"
