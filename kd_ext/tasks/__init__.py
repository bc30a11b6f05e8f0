from kd_ext.tasks import translation_with_kd  # noqa: F401
