from kd_ext.models import architectures, transformer_ext  # noqa: F401
