# Fails when an object compiled for one instruction set defines a weak (linker-merged) symbol.
execute_process(COMMAND ${NM} -C ${OBJECTS} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" weak "${symbols}")
list(FILTER weak EXCLUDE REGEX " V DW\\.ref\\.") # the address of a function, no code
if(weak)
  message(FATAL_ERROR "weak symbols in ${OBJECTS}: ${weak}\n"
    "put the function in an anonymous namespace or avoid the template")
endif()
