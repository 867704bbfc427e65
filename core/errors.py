"""The error that a user sees: which field, which value, what is wrong, and what to do."""


class UserError(Exception):
    """A mistake that the user can correct; the command line prints it in one line and exits with code 2.

    `field` is the option, key or file as the user wrote it, `value` its content, `problem` what is wrong with it, and
    `remedy` the next thing to type or check.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        self.field = field
        self.value = value
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{field}: {str(value)!r} {problem}; {remedy}")

    def __str__(self) -> str:
        text = " ".join(super().__str__().split())
        # Half of a surrogate pair, which JSON may hold, can be neither printed nor sent.
        return text.encode("utf-8", "backslashreplace").decode("utf-8")
