"""Agents: what the workers have registered. The API imports no user code."""

from fastapi import Response

from longshift.db import views
from longshift_api import deps
from longshift_api.deps import EdgeDep
from longshift_api.pages import reply
from longshift_api.problems import documented
from longshift_api.schemas import AgentList, AgentView

router = deps.router("agents")


@router.get(
    "/agents", summary="List the agents", response_model=None, responses={200: {"model": AgentList}, **documented()}
)
async def list_agents(edge: EdgeDep) -> Response:
    """Name, version, queue, the JSON Schemas of input and output. Of one name the version that new turns get is last."""
    return reply(AgentList(data=[AgentView.of(agent) for agent in await views.agents(edge.db)]))
