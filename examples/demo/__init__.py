"""``make demo``: a batch of research tasks on a local stack, with one worker killed in the middle.

documents.py   what is asked, about which documents that come with the installed packages
agents.py      the research agent, each step leaving a line in a file of effects, and taking its time
stack.py       ``longshift up`` as a child process
__main__.py    the story: upload, submit, watch, kill, watch, show
check.py       a program of its own: proves from HTTP answers and the file of effects that every task finished once
"""
