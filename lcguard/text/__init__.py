"""Text hops: what an agent hands over as text, guarded under the same policy as KV.

Free of the engine and of the web, as ``handoff`` is.

guard          one edge's guard of a text, of chat messages, of any JSON value
walk           the strings and numbers of such a value, and which of them are read as one
json_text      JSON inside strings, token by token
search         where values stand in them
rewriting      what is put in their place
placeholder    what a value is called within a conversation
"""
