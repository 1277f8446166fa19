"""The exception for what the user can put right: `train_qlora` prints it and exits with 2."""

import errno

# numbers of an OSError that says where a user cannot write, and why
CANNOT_WRITE = {
    getattr(errno, name) for name in "ENOSPC EFBIG EACCES EPERM EROFS EDQUOT ENOTDIR EEXIST ENAMETOOLONG ELOOP".split()
}


class UserError(ValueError):
    """A mistake in the user's input (a path, a name, a number). Its message is one sentence that says what to do."""
