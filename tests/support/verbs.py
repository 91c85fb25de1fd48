"""Many verbs in one process, since importing torch takes seconds."""

# Prints [status, standard output, standard error] of each list of arguments in the JSON that it is given.
VERBS = """
import contextlib, io, json, sys
from lgd.cli import main
if __name__ == "__main__":
    told = []
    for args in json.loads(sys.argv[1]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(args)
        told.append([status, out.getvalue(), err.getvalue()])
    print("\\n" + json.dumps(told))
"""
