# Records what was built, and why modules were skipped: printed as a summary, and installed as
# fastkd/_build_info.<Python's tag>.json.

set(BUILD_INFO_JSON "{}")
set(BUILD_INFO_SUMMARY "")

# build_info(<cpu|cuda> <key> <value>) records a string, or JSON (true, false, null, a list).
function(build_info part key value)
  string(JSON found ERROR_VARIABLE missing GET "${BUILD_INFO_JSON}" "${part}")
  if(missing)
    string(JSON BUILD_INFO_JSON SET "${BUILD_INFO_JSON}" "${part}" "{}")
  endif()
  if(NOT value MATCHES "^(true|false|null|\\[.*\\])$")
    string(REPLACE "\\" "\\\\" value "${value}")
    string(REPLACE "\"" "\\\"" value "${value}")
    string(REPLACE "\n" " " value "${value}")
    set(value "\"${value}\"")
  endif()
  string(JSON BUILD_INFO_JSON SET "${BUILD_INFO_JSON}" "${part}" "${key}" "${value}")
  set(BUILD_INFO_JSON "${BUILD_INFO_JSON}" PARENT_SCOPE)
endfunction()

# build_info_list(<part> <key> <values>...) records a list of strings.
function(build_info_list part key)
  list(JOIN ARGN "\", \"" joined)
  if(ARGN)
    set(joined "\"${joined}\"")
  endif()
  build_info(${part} ${key} "[${joined}]")
  set(BUILD_INFO_JSON "${BUILD_INFO_JSON}" PARENT_SCOPE)
endfunction()

# summary(<text>) adds a line to the printed summary.
macro(summary text)
  list(APPEND BUILD_INFO_SUMMARY "${text}")
endmacro()

function(build_info_write)
  # File names carry Python's tag: several Pythons may install in place from one tree.
  set(tag "${SKBUILD_SOABI}")
  if(NOT tag)
    set(tag "${Python_SOABI}")
  endif()
  set(file "${CMAKE_CURRENT_BINARY_DIR}/_build_info.${tag}.json")
  file(WRITE "${file}" "${BUILD_INFO_JSON}\n")
  # Remove modules of earlier builds for this Python, which may have had other options.
  foreach(name IN ITEMS _cpu.${tag}.so _cpu.${tag}.pyd _cuda.${tag}.so _cuda.${tag}.pyd _build_info.${tag}.json)
    install(CODE "file(REMOVE \"\${CMAKE_INSTALL_PREFIX}/fastkd/${name}\")")
  endforeach()
  foreach(module IN ITEMS _cpu _cuda)
    if(TARGET ${module})
      install(TARGETS ${module} LIBRARY DESTINATION fastkd)
    endif()
  endforeach()
  install(FILES "${file}" DESTINATION fastkd)
  if(TARGET _cpu) # for editors: the build folder itself is temporary
    install(CODE "file(COPY \"${CMAKE_BINARY_DIR}/compile_commands.json\" DESTINATION \"${CMAKE_SOURCE_DIR}/../build\")")
  endif()

  message(STATUS "fastkd build summary")
  foreach(line IN LISTS BUILD_INFO_SUMMARY)
    message(STATUS "  ${line}")
  endforeach()
endfunction()
