"""cupymoe inside other libraries; each module imports its host, so none is imported by ``import cupymoe``."""
