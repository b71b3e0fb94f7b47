"""Contest programs: every way to read stdin and write stdout that is in use."""

from honest import Honest

SUM = (("2 3\n", "5\n"), ("-1 1", "0"), ("10 20\n\n", " 30 \n\n"))
LINES = (("3\n1 2\n3 4\n5 6\n", "3\n7\n11\n"), ("1\n10 20", "30"))
DEEP = (("5000\n", "5000\n"),)


def _sum(name: str, program: str, **kwargs) -> Honest:
    return Honest(name, program, stdio=SUM, **kwargs)


def _lines(name: str, program: str, **kwargs) -> Honest:
    return Honest(name, program, stdio=LINES, **kwargs)


PROGRAMS = (
    _lines("input_line_by_line", "for _ in range(int(input())):\n    a, b = map(int, input().split())\n    print(a + b)\n"),
    _lines(
        "input_then_the_rest",
        "import sys\n\nn = int(input())\nrest = sys.stdin.read().split()\nfor i in range(n):\n    print(int(rest[2 * i]) + int(rest[2 * i + 1]))\n",
    ),
    _lines(
        "input_is_readline",
        "import sys\n\ninput = sys.stdin.readline\nprint = sys.stdout.write\nfor _ in range(int(input())):\n    print(str(sum(map(int, input().split()))) + '\\n')\n",
    ),
    _lines(
        "stdin_buffer",
        "import sys\n\ndata = sys.stdin.buffer.read().split()\nfor i in range(int(data[0])):\n    print(int(data[2 * i + 1]) + int(data[2 * i + 2]))\n",
    ),
    _lines("iteration_over_stdin", "import sys\n\nnext(sys.stdin)\nfor line in sys.stdin:\n    print(sum(map(int, line.split())))\n"),
    _lines(
        "open_descriptor_zero",
        "lines = open(0).read().splitlines()\nfor line in lines[1:]:\n    print(sum(map(int, line.split())))\n",
    ),
    _lines(
        "fileinput_module",
        "import fileinput\n\nfor number, line in enumerate(fileinput.input()):\n    if number:\n        print(sum(map(int, line.split())))\n",
    ),
    _lines(
        "read_by_size",
        "import io\nimport os\n\ninput = io.BytesIO(os.read(0, os.fstat(0).st_size)).readline\nfor _ in range(int(input())):\n    print(sum(map(int, input().split())))\n",
    ),
    _lines(
        "fast_io_template",
        "import atexit\nimport io\nimport os\nimport sys\n\n_INPUT_LINES = iter(sys.stdin.read().splitlines())\ninput = _INPUT_LINES.__next__\n"
        "_OUTPUT_BUFFER = io.StringIO()\nsys.stdout = _OUTPUT_BUFFER\n\n\n@atexit.register\ndef write():\n    sys.__stdout__.write(_OUTPUT_BUFFER.getvalue())\n\n\n"
        "for _ in range(int(input())):\n    print(sum(map(int, input().split())))\n",
    ),
    _lines(
        "buffered_io_template",
        "import os\nimport sys\nfrom io import BytesIO, IOBase\n\nBUFSIZE = 8192\n\n\nclass FastIO(IOBase):\n    newlines = 0\n\n    def __init__(self, file):\n"
        "        self._fd = file.fileno()\n        self.buffer = BytesIO()\n        self.writable = 'x' in file.mode or 'r' not in file.mode\n"
        "        self.write = self.buffer.write if self.writable else None\n\n    def readline(self):\n        while self.newlines == 0:\n"
        "            b = os.read(self._fd, max(os.fstat(self._fd).st_size, BUFSIZE))\n            self.newlines = b.count(b'\\n') + (not b)\n"
        "            ptr = self.buffer.tell()\n            self.buffer.seek(0, 2), self.buffer.write(b), self.buffer.seek(ptr)\n        self.newlines -= 1\n"
        "        return self.buffer.readline()\n\n    def flush(self):\n        if self.writable:\n            os.write(self._fd, self.buffer.getvalue())\n"
        "            self.buffer.truncate(0), self.buffer.seek(0)\n\n\nclass IOWrapper(IOBase):\n    def __init__(self, file):\n        self.buffer = FastIO(file)\n"
        "        self.flush = self.buffer.flush\n        self.writable = self.buffer.writable\n        self.write = lambda s: self.buffer.write(s.encode('ascii'))\n"
        "        self.readline = lambda: self.buffer.readline().decode('ascii')\n\n\nsys.stdin, sys.stdout = IOWrapper(sys.stdin), IOWrapper(sys.stdout)\n"
        "input = lambda: sys.stdin.readline().rstrip('\\r\\n')\n\nfor _ in range(int(input())):\n    print(sum(map(int, input().split())))\n",
    ),
    _lines(
        "written_at_once",
        "import sys\n\ndef main():\n    data = list(map(int, sys.stdin.read().split()))\n    out = [data[i] + data[i + 1] for i in range(1, len(data), 2)]\n"
        "    sys.stdout.write('\\n'.join(map(str, out)) + '\\n')\n\n\nmain()\n",
    ),
    _lines(
        "thread_with_a_big_stack_and_recursion",
        "import sys\nimport threading\n\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**26)\n\n\ndef depth(n):\n    return 0 if n == 0 else 1 + depth(n - 1)\n\n\n"
        "def main():\n    assert depth(20_000) == 20_000\n    for _ in range(int(input())):\n        print(sum(map(int, input().split())))\n\n\nthreading.Thread(target=main).start()\n",
    ),
    _sum("stdout_buffer", "import sys\n\na, b = map(int, sys.stdin.buffer.readline().split())\nsys.stdout.buffer.write(b'%d\\n' % (a + b))\nsys.stdout.flush()\n"),
    _sum("text_and_buffer_mixed", "import sys\n\na, b = map(int, input().split())\nprint(end='', flush=True)\nsys.stdout.buffer.write(str(a + b).encode())\n"),
    _sum("flushed_prints", "a, b = map(int, input().split())\nprint(a + b, flush=True)\n"),
    _sum("no_line_end_at_the_end", "print(sum(map(int, input().split())), end='')\n"),
    _sum("exit_after_output", "import sys\n\n\ndef main():\n    print(sum(map(int, input().split())))\n    sys.exit(0)\n\n\nif __name__ == '__main__':\n    main()\n"),
    _sum("exit_builtin", "print(sum(map(int, input().split())))\nexit()\n"),
    _sum("quit_and_system_exit", "print(sum(map(int, input().split())))\ntry:\n    quit()\nfinally:\n    raise SystemExit\n"),
    _sum("os_exit_after_flush", "import os\n\nprint(sum(map(int, input().split())), flush=True)\nos._exit(0)\n"),
    _sum("noise_on_stderr", "import sys\n\na, b = map(int, input().split())\nprint('debug', a, b, file=sys.stderr)\nprint(a + b)\n"),
    _sum("windows_line_ends_in_the_source", "a, b = map(int, input().split())\r\nif a:\r\n\tprint(a + b)\r\nelse:\r\n\tprint(b)\r\n"),
    _sum("byte_order_mark_in_a_contest", "\ufeffprint(sum(map(int, input().split())))\n"),
    _sum("main_module", "import __main__\nimport sys\n\n__main__.x = 1\nassert __name__ == '__main__' and sys.modules['__main__'].x == 1\nprint(sum(map(int, input().split())))\n"),
    _sum("classes_and_pickles_in_main", "import pickle\nfrom dataclasses import dataclass\n\n\n@dataclass\nclass P:\n    x: int\n    y: int\n\n\np = pickle.loads(pickle.dumps(P(*map(int, input().split()))))\nprint(p.x + p.y)\n"),
    _sum("arguments_of_the_command_line", "import sys\n\nassert len(sys.argv) == 1\nprint(sum(map(int, input().split())))\n"),
    _sum("end_of_file_is_caught", "total = 0\nwhile True:\n    try:\n        total += sum(map(int, input().split()))\n    except EOFError:\n        break\nprint(total)\n"),
    _sum("stdout_is_no_terminal", "import sys\n\nassert not sys.stdin.isatty() and not sys.stdout.isatty()\nprint(sum(map(int, input().split())))\n"),
    _sum("seek_in_stdin", "import sys\n\nsys.stdin.read()\nsys.stdin.seek(0)\nprint(sum(map(int, sys.stdin.read().split())))\n"),
    _sum("numpy_in_a_contest", "import sys\n\nimport numpy as np\n\nprint(int(np.array(sys.stdin.read().split(), np.int64).sum()))\n", needs="numpy"),
    Honest("windows_line_ends_in_the_input", "n = int(input())\nprint(sum(int(input()) for _ in range(n)))\n", stdio=(("2\r\n3\r\n4\r\n", "7\r\n"),)),
    Honest("spaces_in_the_output", "print('1 2', '', '3')\nprint()\nprint('4\\t5 ')\n", stdio=(("", "1 2 3\n4 5\n"),)),
    Honest("unicode_output", "print(input()[::-1])\n", stdio=(("aé漢😀\n", "😀漢éa\n"),)),
    Honest("bytes_that_are_no_text", "import sys\n\nsys.stdout.buffer.write(sys.stdin.buffer.read()[::-1])\n", stdio=(("ab\x00c\n", "\nc\x00ba"),)),
    Honest("recursion_in_a_contest", "import sys\n\nsys.setrecursionlimit(10**6)\n\n\ndef f(n):\n    return 0 if n == 0 else 1 + f(n - 1)\n\n\nprint(f(int(input())))\n", stdio=DEEP),
    Honest("much_output", "n = int(input())\nfor i in range(n):\n    print(i)\n", stdio=(("100000\n", "\n".join(map(str, range(100_000)))),)),
    Honest("much_input", "import sys\n\ninput()\nprint(sum(map(int, sys.stdin)))\n", stdio=(("x\n" + "7\n" * 200_000, "1400000"),)),
    Honest("no_input_and_no_output", "pass\n", stdio=(("", ""),)),
    Honest("thread_that_prints_at_the_end", "import threading\nimport time\n\n\ndef late():\n    time.sleep(0.05)\n    print(input())\n\n\nthreading.Thread(target=late).start()\n", stdio=(("x\n", "x"),)),
    Honest("daemon_thread_at_the_end", "import threading\nimport time\n\nthreading.Thread(target=time.sleep, args=[1000], daemon=True).start()\nprint(1)\n", stdio=(("", "1"),)),
    Honest(
        "files_between_tests",
        "import os\n\nassert os.listdir('.') == [], os.listdir('.')\nopen('left', 'w').write(input())\nprint(open('left').read())\n",
        stdio=(("a\n", "a\n"), ("b\n", "b\n")),
    ),
    Honest("answers_of_a_closed_class", "class A:\n    def __del__(self):\n        print('gone')\n\n\nA()\nprint('end')\n", stdio=(("", "gone\nend"),)),
    Honest("exit_with_a_message_of_none", "import sys\n\nprint(1)\nsys.exit(None)\n", stdio=(("", "1"),)),
)

