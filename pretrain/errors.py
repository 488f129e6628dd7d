"""The one exception for a user's mistake: the message says what was expected, what was found and the mend."""


class UserError(Exception):
    """Printed as it is, without a traceback; the process exits with 2."""
