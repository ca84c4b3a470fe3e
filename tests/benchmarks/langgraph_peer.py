"""LangGraph with its Postgres saver, as its documentation has it: the peer of what a conversation costs.

Run by the peers' own interpreter (`make peers`): ``python -m tests.benchmarks.langgraph_peer URL TURNS``.
"""

from __future__ import annotations

import sys

from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.graph import END, START, MessagesState, StateGraph

from tests.benchmarks.prose import answer, question

THREAD = RunnableConfig(configurable={"thread_id": "conversation"})


def reply(state: MessagesState) -> dict[str, list[AIMessage]]:
    return {"messages": [AIMessage(answer(len(state["messages"]) // 2))]}


def converse(url: str, *, turns: int) -> None:
    """One thread of ``turns`` turns, each the answer of one node to one message."""
    builder = StateGraph(MessagesState)
    builder.add_node("reply", reply)
    builder.add_edge(START, "reply")
    builder.add_edge("reply", END)
    with PostgresSaver.from_conn_string(url) as saver:
        saver.setup()
        graph = builder.compile(checkpointer=saver)
        for number in range(turns):
            graph.invoke(MessagesState(messages=[HumanMessage(question(number))]), THREAD)
        kept = graph.get_state(THREAD).values["messages"]
    if [message.content for message in kept[-2:]] != [question(turns - 1), answer(turns - 1)]:
        raise RuntimeError("the conversation was not kept")


if __name__ == "__main__":
    converse(sys.argv[1], turns=int(sys.argv[2]))
