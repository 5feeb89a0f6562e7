"""The shell commands of a page: of its blocks, and those with a flag that stand in a sentence or a table."""

import re

KINDS = ("", "sh", "bash")                                  # of blocks that may hold commands
WORDS = (r"(?:\w+=\w+ )*(?:python|mpiexec|srun|sbatch|torchrun|nohup|make|pip|hf|tensorboard|head|scripts/launch\.sh|"
         r"cm-\w+|benchmarks/\w+\.py|evaluations/\w+\.py|datasets/\w+\.py|scripts/\w+\.py)(?= |$)")
NO_COMMANDS = re.compile(r'^(\{|\s*"|#|\d+\.\d+\.|\s+[\[{]|\s*$)')
"""JSON, comments, lists of hosts, the rest of a synopsis and of a job script."""
LAUNCHER = re.compile(
    r"^(mpiexec (-f hosts )?-n \d+|srun( --?\w+[ =]?\w*)*?|torchrun( --[\w-]+ \S+)+) (?=python|scripts/)"
)


def blocks(text):
    """The text of the blocks, also of those that are only indented."""
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        if kind in KINDS:
            yield block
    bare = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for block in re.findall(r"\n\n((?:    .*\n)+)", bare):
        yield re.sub("^    ", "", block, flags=re.MULTILINE)


def lines(text):
    """Every line of a block that could be a command, and the commands in `...`."""
    for block in blocks(text):
        found = [line for line in block.replace("\\\n", " ").splitlines() if not NO_COMMANDS.match(line)]
        if any(re.match(WORDS, line) for line in found):    # otherwise it is a formula
            yield from found
    bare = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`\n]+ [^`\n]+)`", bare):
        if re.match(WORDS, span) and " --" in span:
            yield span


def commands(text):
    """The commands of a page: one line each, without comments and what starts several ranks."""
    for line in lines(text):
        command = re.sub(r"\s+# .*| +&&$|[ ]+\.\.\.(?=$| )", "", line).strip()
        assert re.match(WORDS, command), f"is this a command? {line}"
        command = LAUNCHER.sub("", re.sub(" +", " ", command))
        yield re.sub(r"^(?=(scripts|benchmarks|evaluations|datasets)/\w+\.py)", "python ", command)
