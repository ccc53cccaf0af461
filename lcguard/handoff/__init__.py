"""The rules of a hop between two agents: who may hand over what, and who may read it.

Free of the engine and of the web: nothing in here imports vLLM, torch or a server.

policy, policy_reader, policy_review    what a receiver may not learn, edge by edge
channel                                 what an edge carries, KV or text
lineage                                 what restricts a segment that stands on others
audiences                               several audiences of one publish, their rules as one
request, grants, keys, names            what a request says, and how it is signed
gatekeeper                              whether a handoff may happen
redaction                               what guard ``redact`` covers in a prompt
errors                                  refusals, with their status
"""
