"""What the runtime runs: executables that read tenants' weights from a growing bank by slot.

    tenant's programs --fit--> Fit --plan_schema--> Schema --Store--> bank [slots, ...]
                                                        \\--compile_executable--> Executable(bank, slots, inputs)

Nothing here knows of requests, deadlines or threads.
"""
