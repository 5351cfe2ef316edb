"""Conversations: messages, tool calls, the embedded tokenizer, and token-exact rendering."""
