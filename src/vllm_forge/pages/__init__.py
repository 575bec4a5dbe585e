"""The generated pages: functions of a project's records, listed in ``registry``."""
